"""The management API below /api/. The pull API's paths are in delivery."""
from django.urls import path

from consumers.api import backfills, configuration, messages, operations, replays, schema, trying

urlpatterns = [
    path("schema", schema.SchemaView.as_view(), name="schema"),
    path("docs", schema.docs, name="docs"),
    path("sources", configuration.SourcesView.as_view()),
    path("sources/<str:name>", configuration.SourceView.as_view()),
    path("sources/<str:name>/check", operations.SourceCheckView.as_view()),
    path("sources/<str:name>/acknowledge_gap", operations.AcknowledgeGapView.as_view()),
    path("sources/<str:name>/recover", operations.RecoverView.as_view()),
    path("sources/<str:name>/events", operations.SourceEventsView.as_view()),
    path("sources/<str:name>/tables", operations.SourceTablesView.as_view()),
    path("http_endpoints", configuration.EndpointsView.as_view()),
    path("http_endpoints/<str:name>", configuration.EndpointView.as_view()),
    path("consumers", configuration.ConsumersView.as_view()),
    path("consumers/<str:name>", configuration.ConsumerView.as_view()),
    path("consumers/<str:name>/pause", operations.PauseView.as_view()),
    path("consumers/<str:name>/resume", operations.ResumeView.as_view()),
    path("consumers/<str:consumer>/test", trying.TestView.as_view()),
    path("consumers/<str:consumer>/messages", messages.MessagesView.as_view()),
    path("consumers/<str:consumer>/messages/retry", messages.RetryView.as_view()),
    path("consumers/<str:consumer>/messages/discard", messages.DiscardView.as_view()),
    path("consumers/<str:consumer>/rewind", replays.RewindView.as_view()),
    path("consumers/<str:consumer>/republish", replays.RepublishView.as_view()),
    path("backfills", backfills.BackfillsView.as_view()),
    path("backfills/<str:backfill>", backfills.BackfillView.as_view()),
    path("backfills/<str:backfill>/pause", backfills.PauseView.as_view()),
    path("backfills/<str:backfill>/resume", backfills.ResumeView.as_view()),
    path("backfills/<str:backfill>/cancel", backfills.CancelView.as_view()),
]
