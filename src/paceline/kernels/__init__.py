"""Operations on one device: a reference in plain torch first, faster variants beside it."""
