"""What launcher and worker say to each other, and how.

`messages` are the typed records, `channel` carries them over a socket pair together with file
descriptors, `progress` is a page of shared memory that a worker writes on its hot path
and the launcher reads. Neither side imports the other.
"""
