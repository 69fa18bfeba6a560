# SPDX-License-Identifier: Apache-2.0
"""What is known about models: where their blocks are and how they are called."""
