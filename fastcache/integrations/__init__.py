# SPDX-License-Identifier: Apache-2.0
"""Bridges to other libraries; nothing else of fastcache imports them."""
