"""What S3 and the network say, sorted by what to do about it, with words for people."""

from __future__ import annotations

from enum import Enum

AGAIN = "run the command again, all that was stored before is intact."


class Refusal(Enum):
    """Why a request failed: the fact and the way out."""

    PASSING = ("it does not answer as it should", f"look at its status and your network, then {AGAIN}")
    MISSING = ("there is no such key", AGAIN)
    TAKEN = ("the key is taken", AGAIN)
    BEYOND_THE_END = ("the value ends before that", AGAIN)
    NO_BUCKET = (
        "there is no such bucket",
        "correct the name in the URI, or make the bucket, for example with: aws s3 mb s3://NAME",
    )
    NO_CREDENTIALS = (
        "no credentials were found",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run: aws configure",
    )
    EXPIRED = (
        "the credentials have expired",
        "renew them, for example with: aws sso login, and run the command again, all that was stored is intact.",
    )
    WRONG_CREDENTIALS = (
        "the credentials are not accepted",
        "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE and the endpoint_url that they are for.",
    )
    DENIED = (
        "permission denied",
        "allow s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload on the prefix and s3:ListBucket "
        "on the bucket.",
    )
    NO_CONDITIONS = (
        "it has no conditional writes",
        "two supervisors could not be told apart; add --single-supervisor and take care that only one ever runs.",
    )
    CLOCK = ("this machine's clock is wrong", "set it, for example with: timedatectl set-ntp true")
    WRONG_REGION = ("the bucket is in another region", "set AWS_REGION to the bucket's region.")
    WRONG_PLACE = ("the endpoint cannot be used", "correct endpoint_url in the URI, or AWS_ENDPOINT_URL_S3.")
    OTHER = ("it refused", AGAIN)


_BY_CODE = {
    "NoSuchKey": Refusal.MISSING,
    "404": Refusal.MISSING,
    "NoSuchBucket": Refusal.NO_BUCKET,
    "PreconditionFailed": Refusal.TAKEN,
    "412": Refusal.TAKEN,
    "InvalidRange": Refusal.BEYOND_THE_END,
    "416": Refusal.BEYOND_THE_END,
    "ConditionalRequestConflict": Refusal.PASSING,
    "OperationAborted": Refusal.PASSING,
    "RequestTimeout": Refusal.PASSING,
    "BadDigest": Refusal.PASSING,
    "IncompleteBody": Refusal.PASSING,
    "XAmzContentChecksumMismatch": Refusal.PASSING,
    "SlowDown": Refusal.PASSING,
    "Throttling": Refusal.PASSING,
    "ExpiredToken": Refusal.EXPIRED,
    "ExpiredTokenException": Refusal.EXPIRED,
    "TokenRefreshRequired": Refusal.EXPIRED,
    "InvalidAccessKeyId": Refusal.WRONG_CREDENTIALS,
    "SignatureDoesNotMatch": Refusal.WRONG_CREDENTIALS,
    "InvalidToken": Refusal.WRONG_CREDENTIALS,
    "AuthorizationHeaderMalformed": Refusal.WRONG_REGION,
    "PermanentRedirect": Refusal.WRONG_REGION,
    "301": Refusal.WRONG_REGION,
    "RequestTimeTooSkewed": Refusal.CLOCK,
    "AccessDenied": Refusal.DENIED,
    "AllAccessDisabled": Refusal.DENIED,
    "403": Refusal.DENIED,
    "NotImplemented": Refusal.NO_CONDITIONS,
    "501": Refusal.NO_CONDITIONS,
}


def refusal_of(error: BaseException) -> Refusal:
    """By the error's code where there is one, else by its kind. A cut or silent connection is a passing reason."""
    from botocore import exceptions as known

    if isinstance(error, known.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in _BY_CODE:
            return _BY_CODE[code]
        return Refusal.PASSING if status >= 500 or status in (408, 429) else Refusal.OTHER
    if isinstance(error, (known.NoCredentialsError, known.PartialCredentialsError, known.ProfileNotFound)):
        return Refusal.NO_CREDENTIALS
    if isinstance(error, (known.TokenRetrievalError, known.SSOError, known.UnauthorizedSSOTokenError)):
        return Refusal.EXPIRED
    if isinstance(error, (known.InvalidEndpointConfigurationError, ValueError)):
        return Refusal.WRONG_PLACE
    if isinstance(error, known.ParamValidationError):
        return Refusal.OTHER
    return Refusal.PASSING
