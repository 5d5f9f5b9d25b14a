"""An S3 server on this machine, and the environment that leads S3 clients to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def s3_environment(port: int) -> dict[str, str]:
    """Variables for botocore: the server's address, made-up credentials, and no look for better ones."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


@contextmanager
def s3_server() -> Iterator[int]:
    """A server with one empty bucket named ``bucket``; yields its port."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        _, port = server.get_host_and_port()
        boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        ).create_bucket(Bucket="bucket")
        yield port
    finally:
        server.stop()
