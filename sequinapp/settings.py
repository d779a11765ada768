"""Django's settings, made of the environment (`sequinapp/env.py`)."""
from __future__ import annotations

import sys
from typing import Any

from django.templatetags.static import static

from sequinapp import env as environment
from sequinapp.embedded_postgres import EmbeddedPostgres

ENV = environment.read()

BASE_DIR = environment.BASE_DIR
SECRET_KEY = ENV.secret_key
ENCRYPTION_KEYS = ENV.encryption_keys
DEBUG = ENV.debug
ALLOWED_HOSTS = ENV.allowed_hosts
CSRF_TRUSTED_ORIGINS = ENV.csrf_trusted_origins

SEQUIN_HOME = ENV.home
SEQUIN_ADMIN_USER, SEQUIN_ADMIN_PASSWORD = ENV.admin_user, ENV.admin_password
SEQUIN_WORKERS = ENV.workers
SEQUIN_ALLOWED_NETWORKS = ENV.allowed_networks
SEQUIN_MIN_FREE_DISK = ENV.min_free_disk
SEQUIN_STORE_DIRECTORY = None if ENV.database_url else EmbeddedPostgres(ENV.home).root
SEQUIN_MAX_WAITERS = ENV.max_waiters
SEQUIN_RETENTION = ENV.retention
SEQUIN_ALLOW_PLAINTEXT = ENV.allow_plaintext
SEQUIN_RESTRICT_SOURCES = ENV.restrict_sources
SEQUIN_METRICS_PUBLIC = ENV.metrics_public

INSTALLED_APPS = [
    "consumers",  # before unfold: the first page is ours
    "unfold",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.postgres",
    "rest_framework",
    "drf_spectacular",
    "django_q",
    "sequinapp",
    "capture",
    "delivery",
]
MIDDLEWARE = [
    "consumers.console_headers.ConsoleHeaders",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "consumers.audit.ActorKnown",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "sequinapp.urls"
WSGI_APPLICATION = "sequinapp.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
FORMAT_MODULE_PATH = ["sequinapp.formats"]
STATIC_URL = "static/"
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False
LOGIN_URL = "admin:login"
LOGIN_REDIRECT_URL = "admin:index"
APPEND_SLASH = True
SECURE_CONTENT_TYPE_NOSNIFF = True
SESSION_COOKIE_NAME = "sequin_session"
SESSION_COOKIE_AGE = 12 * 3600
SESSION_COOKIE_HTTPONLY = CSRF_COOKIE_HTTPONLY = True
# A TLS proxy in front is known by the origins it needs (see consumers/console_headers.py).
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = bool(CSRF_TRUSTED_ORIGINS) and all(o.startswith("https://") for o in CSRF_TRUSTED_ORIGINS)
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}", "OPTIONS": options}
    for name, options in (
        ("UserAttributeSimilarityValidator", {}), ("MinimumLengthValidator", {"min_length": 10}), ("CommonPasswordValidator", {}),
        ("NumericPasswordValidator", {}),
    )
]  # fmt: skip
DATA_UPLOAD_MAX_MEMORY_SIZE = 1_048_576  # a request's body, bytes; also for the API

IS_WEB = "run_web" in sys.argv
WEB_POOL_SIZE = 16


def _database() -> dict[str, Any]:
    if ENV.database_url is not None:
        database = environment.parse_database_url(ENV.database_url)
    else:
        database = EmbeddedPostgres(ENV.home).django_database()
    database["CONN_MAX_AGE"] = 0 if IS_WEB else None
    database["OPTIONS"] = {"connect_timeout": 10, **database.get("OPTIONS", {})}
    if IS_WEB:
        # A long poll gives its connection back, so a few serve a thousand waiters.
        database["ENGINE"] = "sequinapp.postgres"
    return database


DATABASES = {"default": _database()}

REST_FRAMEWORK: dict[str, Any] = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["consumers.tokens.TokenAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["consumers.tokens.ScopeRequired"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "consumers.api.negotiation.AlwaysJson",
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "consumers.api.errors.answer",
    "UNAUTHENTICATED_USER": None,
    "COERCE_DECIMAL_TO_STRING": False,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Sequin",
    "DESCRIPTION": "Every change of a Postgres database, by HTTP push or pull.",
    "VERSION": "0.1.0",
    "SERVE_INCLUDE_SCHEMA": False,
    "POSTPROCESSING_HOOKS": ["drf_spectacular.hooks.postprocess_schema_enums", "consumers.api.schema.with_errors"],
    "DISABLE_ERRORS_AND_WARNINGS": True,
    "SERVE_AUTHENTICATION": ["consumers.tokens.TokenAuthentication", "rest_framework.authentication.SessionAuthentication"],
    "SERVE_PERMISSIONS": ["consumers.tokens.ConsoleOrToken"],
}

EMAIL_CONFIGURED = ENV.email is not None
DEFAULT_FROM_EMAIL = ENV.email_from
globals().update(ENV.email or {})

SEQUIN_SENDER = "delivery.push.once.post"  # how the console sends a test message

# A pump's slice is 120 s at most and an endpoint's timeout 60 s more; delivery/checks.py keeps these three apart.
PUMP_SLICE_S = 120
Q_CLUSTER: dict[str, Any] = {
    "name": "sequin",
    "workers": ENV.workers,
    "timeout": 300,
    "retry": 600,
    "max_attempts": 1,
    "ack_failures": True,
    "save_limit": -1,
    "catch_up": False,
    "label": "Tasks",
    "guard_cycle": 0.5,
    "poll": 0.2,
    "recycle": 100,
    # Backfills have workers of their own, so that they never keep a push waiting.
    "ALT_CLUSTERS": {"replay": {"workers": max(1, ENV.workers // 4)}},
}
if ENV.broker_url is not None:
    Q_CLUSTER["redis"] = ENV.broker_url
else:
    Q_CLUSTER["orm"] = "default"
    Q_CLUSTER["broker_class"] = "delivery.broker.NotifyBroker"

UNFOLD = {
    "SITE_TITLE": "Sequin",
    "SITE_HEADER": "Sequin",
    "SITE_SYMBOL": "stream",
    "SITE_URL": None,
    "SHOW_VIEW_ON_SITE": False,
    "SHOW_HISTORY": False,
    "LOGIN": {"form": "consumers.login.LoginForm"},
    "GLOBAL_CALLBACK": "consumers.admin.shell.context",
    "STYLES": [lambda request: static("console/console.css")],
    "SCRIPTS": [lambda request: static("console/shell.js")],
    "DASHBOARD_CALLBACK": "consumers.admin.home.fill",
    "SIDEBAR": {
        "navigation": "consumers.admin.shell.navigation",
    },
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "console": {"()": "sequinapp.log_format.ConsoleFormatter"},
        "json": {"()": "sequinapp.log_format.JsonFormatter"},
    },
    "filters": {"without_repeats": {"()": "sequinapp.log_format.WithoutRepeats"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": ENV.log_format}},
    "root": {"handlers": ["stderr"], "level": ENV.log_level},
    "loggers": {
        "django.request": {"level": "ERROR"},
        "django.security": {"level": "ERROR"},
        "psycopg": {"level": "ERROR"},
        "psycopg.pool": {"level": "ERROR"},
        "urllib3": {"level": "ERROR"},
        "django-q": {"level": "WARNING", "handlers": ["stderr"], "propagate": False, "filters": ["without_repeats"]},
        "_granian": {"level": "WARNING", "handlers": ["stderr"], "propagate": False},
    },
}
