"""One file per host that the library plugs into."""
