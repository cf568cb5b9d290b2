"""What peftc relies on in other libraries beyond their documented API: one room, a test for each, so that a release which
changes it fails by name."""
