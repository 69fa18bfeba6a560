# SPDX-License-Identifier: Apache-2.0
"""What is used around runs: measuring, inspecting, splitting batches."""
