"""What runs in the process of the reference's tests: peftc's alias, stand-ins for names that it lacks, and the log."""
