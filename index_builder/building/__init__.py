"""From bundle and catalogue to a published release."""
