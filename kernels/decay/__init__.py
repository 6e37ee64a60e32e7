"""Recurrences with a diagonal decay: S_t = diag(a_t) S_{t-1} + k_t v_t^T."""
