# SPDX-License-Identifier: Apache-2.0
"""What is remembered from step to step."""
