"""The techniques that come with hookcore, and what it knows about other libraries' models."""
