# SPDX-License-Identifier: Apache-2.0
"""One denoiser call: which run and step it is, what is decided, what runs, what is noted."""
