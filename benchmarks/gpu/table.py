"""Results that grow line by line: CSV files a later call continues."""

import csv


class Table:
    """A CSV file of dicts. Each row is written at once, so an interruption loses none.

    Args:
        path: of the file.
        columns: its names.
        digest: rows that were written under another one are dropped.
    """

    def __init__(self, path, columns, digest):
        self._path, self._columns = path, (*columns, "digest")
        self._digest = digest
        self.rows = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self.rows = [row for row in rows if row.get("digest") == digest]
        self._rewrite()

    def __contains__(self, facts):
        """Whether a row has these facts, a dict."""
        return any(all(row[k] == str(v) for k, v in facts.items()) for row in self.rows)

    def add(self, row):
        """Append a row."""
        row = {k: str(v) for k, v in row.items()} | {"digest": self._digest}
        self.rows.append(row)
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def _rewrite(self):
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
