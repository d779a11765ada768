"""The store's tables and functions, from `consumers/store/schema.sql`."""
from pathlib import Path

from django.db import migrations

SCHEMA = Path(__file__).resolve().parent.parent / "store" / "schema.sql"


class Migration(migrations.Migration):
    dependencies = [("consumers", "0001_initial")]

    operations = [migrations.RunSQL(SCHEMA.read_text(encoding="utf-8"), migrations.RunSQL.noop)]
