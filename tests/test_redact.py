"""No secret survives `redact`, and what holds none comes back as it was."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.redact import redact
from trainer.stream.location import is_remote, local_path

# A word that nothing else in the texts contains, so that every part of a secret that survives is found.
CORE = "Zq9"
SCHEMES = [
    "http", "https", "HTTP", "s3", "gs", "hf", "postgresql", "postgresql+psycopg2", "mysql+pymysql", "mssql+pyodbc",
    "sqlite+pysqlcipher", "simplecache::http", "filecache::s3", "ftp", "sftp", "WebDAV",
]  # fmt: skip
PARAMETERS = [
    "X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature", "X-Goog-Credential", "Signature",
    "AWSAccessKeyId", "Key-Pair-Id", "Policy", "sig", "token", "access_token", "api_key", "apikey", "password", "pwd",
    "client_secret", "key", "session_id", "odbc_connect", "refresh-token", "sslpassword", "auth", "x-amz-signature",
]  # fmt: skip
NAMES = [
    "TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "MYSQL_PWD", "DB_PASS", "SSHPASS",
    "api_key", "mlflow_tracking_password", "clientSecret", "password", "secret", "private-key", "GITHUB_TOKEN",
]  # fmt: skip
hosts = st.sampled_from(["host", "host:5000", "127.0.0.1:80", "[::1]:5000", "bucket", "a.example.org", ""])
paths = st.sampled_from(["", "/", "/d/train", "/a@b/c", "/db", "/datasets/me/acts@main/train-000000.tar", "//mnt/x.db"])
prose = st.sampled_from(["", "reading ", "tracking.uri=", "see (", "cannot read '", 'data.shards: "', "a\nb "])
ends = st.sampled_from(["", ": no such file", ", and more", ") again", "' failed", "\nnext line", " and http://host/x"])
secret = st.text(string.ascii_letters + string.digits + "-._~!$*+,;=%:/?#", max_size=12).map(
    lambda t: f"{CORE}{t}{CORE}"
)
in_query = st.text(string.ascii_letters + string.digits + "-._~!$*+,:/%=", max_size=12).map(
    lambda t: f"{CORE}{t}{CORE}"
)
in_shell = st.text(string.ascii_letters + string.digits + "-._~+:/%@=", max_size=12).map(lambda t: f"{CORE}{t}{CORE}")


def check(text):
    shown = redact(text)
    assert CORE not in shown, shown
    assert redact(shown) == shown
    return shown


@given(st.sampled_from(SCHEMES), st.sampled_from(["", "user", "us.er%40x"]), secret, hosts, paths, prose, ends)
@example("postgresql", "user", f"{CORE}/{CORE}", "host", "/db", "", "")
@example("http", "", f"{CORE}?x#{CORE}", "h", "", "", "")
def test_passwords_of_urls(scheme, user, password, host, path, before, after):
    text = check(f"{before}{scheme}://{user}:{password}@{host}{path}{after}")
    assert text == f"{before}{scheme}://***@{host}{path}{after}"


@given(st.sampled_from(SCHEMES), secret.filter(lambda t: not set(t) & set("/?#:")), hosts, paths, prose, ends)
def test_tokens_in_the_place_of_the_user(scheme, token, host, path, before, after):
    assert check(f"{before}{scheme}://{token}@{host}{path}{after}").startswith(f"{before}{scheme}://***@{host}")


@given(st.sampled_from(SCHEMES), st.sampled_from(PARAMETERS), in_query, hosts, paths, st.sampled_from("?#"), prose)
def test_signed_parameters(scheme, name, value, host, path, mark, before):
    kept = "versionId=3"
    text = check(f"{before}{scheme}://{host}{path}{mark}{kept}&{name}={value}&sslmode=require")
    assert text == f"{before}{scheme}://{host}{path}{mark}{kept}&{name}=***&sslmode=require"


@given(st.from_regex(r"[A-Za-z]{2}[0-9]{2}[A-Za-z0-9_\-]{16,40}", fullmatch=True))
def test_long_values_that_read_like_a_key(value):
    for url in (
        f"https://h/d?x={value}",
        f"https://h/d?{value}",
        f"https://h/d?a=1#{value}",
        f"s3://b/d?x={value}&y=2",
    ):
        assert value not in redact(url)


def test_a_url_inside_a_parameter_and_one_that_pathlib_folded():
    check(f"http://h/x?target=http://u:{CORE}@g/y&a=1")
    check(f"http://h/x?target=http%3A%2F%2Fu%3A{CORE}%40g")
    check(str(local_path(f"nothing/http://u:{CORE}@h/x")))


variables = st.sampled_from([name for name in NAMES if name.isidentifier()])


@given(variables, in_shell, st.sampled_from(["", "'", '"']), st.sampled_from(["pipe:", "PIPE:", "pipe: "]))
def test_environment_of_commands(name, value, quote, scheme):
    assert check(f"{scheme}{name}={quote}{value}{quote} ssh host cat {{name}}") == f"{scheme.rstrip()}ssh ..."
    check(f"{scheme}ANY={quote}{value}{quote} ssh host cat {{name}}")
    check(f"data.shards={scheme}env A={quote}{value} tail{quote} ssh host cat {{name}}")


@given(
    st.sampled_from(
        [
            "curl -u me:{} http://h/{{name}}", "curl --token {} http://h/{{name}}", "curl --password={} x",
            "mysql -p{} x",
            "curl http://u:{}@h/{{name}}", "curl -H 'Authorization: Bearer {}' x", "A=$(echo {} x) cat", "(A={};cat x)",
            "A=`echo {} x` cat", "echo '{}", "sshpass -p {} ssh h", "A=1; B={} cat", "A=x|{} b",
        ]
    ),
    in_shell,
    st.sampled_from(["", "reading ", "data.shards=", "data.shards: '"]),
)  # fmt: skip
def test_whatever_else_a_command_holds(command, value, before):
    check(f"{before}pipe:{command.format(value)}")


@given(st.sampled_from(NAMES), in_shell.filter(lambda t: not set(t) & set("/@:")), prose)
def test_options_assignments_and_headers_in_free_text(name, value, before):
    for text in (
        f"{name}={value}", f"--{name} {value}", f"--{name}={value}", f"{name}='{value} x'", f'{name} = "{value}"',
        f"Authorization: Bearer {value}", f"password: {value}", f'"password": "{value}"', f"x-api-key: {value}",
    ):  # fmt: skip
        check(f"{before}{text} and more")


@given(
    st.sampled_from(SCHEMES), hosts, paths, st.sampled_from(["", "?versionId=3", "?mode=ro&uri=true", "#top", "?a=1#b"])
)
def test_urls_without_a_secret_are_unchanged(scheme, host, path, query):
    url = f"{scheme}://{host}{path}{query}"
    assert redact(url) == url and redact(f"reading {url}: no such file") == f"reading {url}: no such file"


@given(st.text(string.ascii_letters + string.digits + " .,;/-_()'\"{}[]*\n", max_size=200))
def test_text_without_a_secret_is_unchanged(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "data/demo/layer-06/train", "/data/a@b/c", "C:/data/x@y", "file:///data/a", "git@host:me/it.git",
        "data.shards is a pipe: command and is off; set data.allow_pipe=true (or --allow-pipe) to permit it",
        "pipe:ssh ...: the output did not arrive within data.timeout=60 s, 5 attempts failed",
        "optim.lr=1e-3 loss.sp=0.1 stages.0.steps=20 tracking.uri=http://localhost:5000 run.seed=3",
        "pad_token=<pad> max_tokens=5 tokenizer=gpt2 key 'a' is not of letters, block.key=train-000000-000003",
        "sqlite:///runs/mlflow.db", "lambda x: x == y", "step 3: skipped, see skipped.jsonl",
        "hf://datasets/me/acts@v1",
    ],
)  # fmt: skip
def test_what_the_program_says_is_unchanged(text):
    assert redact(text) == text


@pytest.mark.parametrize("location", ["HTTP://h/d", "S3://b/d", "simplecache::http://h/d", "Pipe:cat {name}", "gs://b"])
def test_urls_are_never_taken_for_paths(location):
    assert is_remote(location)


@pytest.mark.parametrize("location", ["data/x", "/data/x", "file:///data/x", "FILE:///data/x", "C:/x", "."])
def test_paths_are_local(location):
    assert not is_remote(location) and "://" not in str(local_path(location))
