"""Bridges to other libraries; nothing else of fastcache imports them."""
