"""Sites that keep their data and share one adapter."""
