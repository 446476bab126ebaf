"""Tables of paths and labels: CSV, Parquet and COCO-style JSON files."""
