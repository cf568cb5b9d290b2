"""What a method declares: slots, lowerings, and its record."""
