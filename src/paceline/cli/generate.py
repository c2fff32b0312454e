def generate() -> None:
    pass
