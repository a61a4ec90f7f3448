"""One file or folder per host that the library plugs into."""
