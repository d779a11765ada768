"""The store's tables and functions, from `schema.sql` and `replays.sql` in `consumers/store`."""
from pathlib import Path

from django.db import migrations

STORE = Path(__file__).resolve().parent.parent / "store"


class Migration(migrations.Migration):
    dependencies = [("consumers", "0001_initial")]

    operations = [
        migrations.RunSQL((STORE / name).read_text(encoding="utf-8"), migrations.RunSQL.noop) for name in ("schema.sql", "replays.sql")
    ]
