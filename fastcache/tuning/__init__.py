# SPDX-License-Identifier: Apache-2.0
"""The best recipe for a model, found on that model."""
