"""How the shipped towers were made; nothing imports these recipes."""
