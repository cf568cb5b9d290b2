"""What peftc relies on in other libraries beyond their documented API: one file for each subject, one function for each fact."""
