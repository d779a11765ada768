"""`group_columns` are looked for in the consumer's tables before it is saved: a column that is nowhere would put all rows in one group."""
from __future__ import annotations

import pytest
from django.core.exceptions import ValidationError

from consumers import changes
from tests.routing.world import Shop, shop  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_group_column_that_no_table_has_is_refused_and_one_that_some_lack_is_said(shop: Shop) -> None:  # noqa: F811
    shop.execute("CREATE TABLE orders (id int PRIMARY KEY, team int)", "CREATE TABLE teams (id int PRIMARY KEY)")
    both = ["public.orders", "public.teams"]
    with pytest.raises(ValidationError, match="none of the tables has a column 'nowhere'") as refused:
        shop.consumer(tables=both, group_columns=["team", "nowhere"])
    assert set(refused.value.message_dict) == {"group_columns"}
    consumer = shop.consumer(tables=both, group_columns=["team"])
    assert [notice.text.split(":")[0] for notice in consumer.notices] == ["public.teams has no team"]
    consumer.group_columns = ["nowhere"]
    with pytest.raises(ValidationError, match="a column 'nowhere'"):
        changes.save(consumer)
