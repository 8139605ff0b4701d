"""Networks behind the one `Denoiser` contract."""
