"""How moments are shown: as everywhere else in the product, not as in American letters."""
DATETIME_FORMAT = "Y-m-d H:i:s"
DATE_FORMAT = "Y-m-d"
TIME_FORMAT = "H:i:s"
