"""What happened, kept durably, and what it cost; reads events only.

`store.Ledger` keeps events, `account` and `guarantee` work out what they mean, `economics`,
`energy` and `carbon` what they cost, `text` and `page` show it.
"""
