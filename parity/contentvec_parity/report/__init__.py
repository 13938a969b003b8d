"""What was found, as text, JSON, Markdown and a page."""
