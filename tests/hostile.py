# SPDX-License-Identifier: Apache-2.0
"""What no checked JSON file may begin with, whatever it is of: the bytes, and a word of what is said."""

NO_OBJECT = (
    (b"", "JSON"),
    (b"null", "object"),
    (b"[1, 2]", "object"),
    (b"s3cret words", "JSON"),
    (b'{"format": "s3cret', "JSON"),
    (b"\x80\x04\x95s3cret.", "JSON"),  # a pickle
    (b"PK\x03\x04s3cret", "JSON"),  # torch.save
    (b"\xff\xfe{\x00}\x00", "JSON"),
)
