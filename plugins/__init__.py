"""The methods that come with peftc, one module each, registered through the same entry points as anyone's."""
