"""The reference's own tests, run against peftc's alias: how many of those that pass there pass here, and why others do not."""
