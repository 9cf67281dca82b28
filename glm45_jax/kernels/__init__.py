"""Operations with a reference and, where there is one, a fast twin. `dispatch.pick` chooses,
loudly.
"""
