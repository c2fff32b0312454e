def verify() -> None:
    pass
