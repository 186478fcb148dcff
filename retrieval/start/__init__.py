"""``omni start``: from a catalogue and a log to answers, by the ordinary commands."""
