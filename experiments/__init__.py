import data  # noqa: F401  before torch: see there
