"""Files and folders that are written whole or not at all, and JSON of whatever origin."""

from ldmq_kernels.files.json_of_others import NotJsonError, parse_json, read_json, shortened
from ldmq_kernels.files.outputs import (
    Fill,
    MisplacedError,
    check_place,
    finish_writing_into,
    output_file,
    output_folder,
    write_into,
    write_whole,
)
from ldmq_kernels.files.paths import alias_in_ascii, printable
from ldmq_kernels.files.scratch import PART
from ldmq_kernels.files.tables import csv_bytes, write_csv

__all__ = [
    "PART",
    "Fill",
    "MisplacedError",
    "NotJsonError",
    "alias_in_ascii",
    "check_place",
    "csv_bytes",
    "finish_writing_into",
    "output_file",
    "output_folder",
    "parse_json",
    "printable",
    "read_json",
    "shortened",
    "write_csv",
    "write_into",
    "write_whole",
]
