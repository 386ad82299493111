"""Carbon intensity of electricity by country.

Source: CodeCarbon's offline table (`global_energy_mix.json`, MIT licence), which is taken
from Our World in Data; yearly means for 2023 (2022 for ARE, ISL and ISR). A yearly mean of a
country says little about one data centre at one hour: set `carbon_g_per_kwh` where the
supplier's own figure is known.
"""

from __future__ import annotations

from trainonce.errors import ConfigError

# ISO 3166-1 alpha-3 -> grams of CO2 equivalent a kWh.
G_PER_KWH: dict[str, float] = {
    "ARE": 561.135, "AUS": 548.692, "AUT": 110.812, "BEL": 138.107, "BRA": 98.348, "CAN": 170.043,
    "CHE": 34.843, "CHN": 582.317, "DEU": 380.95, "DNK": 151.65, "ESP": 174.05, "FIN": 79.158,
    "FRA": 56.039, "GBR": 237.589, "IND": 713.441, "IRL": 290.805, "ISL": 27.68, "ISR": 582.927,
    "ITA": 330.718, "JPN": 485.392, "KOR": 430.567, "NLD": 267.622, "NOR": 30.08, "POL": 661.926,
    "PRT": 165.553, "SGP": 470.783, "SWE": 40.695, "TWN": 642.378, "USA": 369.473, "ZAF": 707.686,
}  # fmt: skip


def carbon_g_per_kwh(country: str) -> float:
    """Return the yearly mean for `country`, an ISO 3166-1 alpha-3 code in either case.

    Raises:
        ConfigError: It is not in the table.
    """
    try:
        return G_PER_KWH[country.upper()]
    except KeyError:
        raise ConfigError(
            f"no carbon intensity is known for country {country!r}",
            hint="one of " + ", ".join(sorted(G_PER_KWH)) + "; or set carbon_g_per_kwh",
        ) from None
