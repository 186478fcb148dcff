"""``python -m encoders.pretraining``: make the query tower that ships with the package."""

from encoders.pretraining.tiny_multilingual import command

if __name__ == "__main__":
    command(prog_name="python -m encoders.pretraining")
