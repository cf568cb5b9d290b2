"""What peftc knows about other libraries, one folder or file for each."""
