"""Admission, countersigning, fetching: what narseal does between asking and answering."""
