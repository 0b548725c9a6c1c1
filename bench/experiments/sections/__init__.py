"""The sections of the page, each made from the JSON files of one experiment or two."""
