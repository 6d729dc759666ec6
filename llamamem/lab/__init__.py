"""The mechanism lab: what a recurrent state can hold, measured on data that are made on the spot.

`dla*` needs NumPy alone and no training; `mqar*` trains small models and needs PyTorch. The recurrences are the
reference's own.
"""
