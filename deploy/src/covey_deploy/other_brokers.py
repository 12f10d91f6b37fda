"""The rights of a fleet in the words of EMQX, HiveMQ and AWS IoT Core.

Made of the same table as Mosquitto's (`access`). None of these brokers is run by covey's tests: the forms are those of
their documentation, and the tests look at shape, sizes and topics only. docs/broker.md says what they lack.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from xml.sax.saxutils import escape

from covey_deploy.access import BOTH, CHANNELS, COORDINATOR, DEVICE, OPERATOR, READ, SELF, WRITE, Access, Right

AWS_POLICY_CHARACTERS = 2048  # of one policy, white space not counted; a fleet's name may have 40 characters
AWS_NAME = "${iot:Certificate.Subject.CommonName}"
USER = "${username}"  # EMQX
HIVEMQ_USER = "${{username}}"


def emqx_acl(fleet: str) -> str:
    """acl.conf of EMQX 5: the first rule that fits holds, so refusals stand before what everybody may."""
    access, lines = Access(fleet), [f"%% The fleet {fleet}. Made by `covey broker config`: docs/broker.md."]
    for role, rights in access.more().items():
        lines += _emqx_rules(f'{{username, "{role}"}}', rights)
        refused = ", ".join(f'"{access.own(channel, role)}"' for channel in CHANNELS)
        lines.append(f'{{deny, {{username, "{role}"}}, all, [{refused}]}}.')
    lines += [*_emqx_rules("all", access.everyone()), "{deny, all}."]
    return "\n".join(lines) + "\n"


def _emqx_rules(who: str, rights: Iterable[Right]) -> list[str]:
    told = list(rights)
    rules = []
    for verb, action in ((WRITE, "publish"), (READ, "subscribe")):
        topics = [f'"{right.topic.replace(SELF, USER)}"' for right in told if right.verb in (verb, BOTH)]
        if topics:
            rules.append(f"{{allow, {who}, {action}, [{', '.join(topics)}]}}.")
    return rules


def hivemq_roles(fleet: str) -> str:
    """The roles of HiveMQ's file RBAC extension; its users, who have passwords, come beside them."""
    access = Access(fleet)
    roles = {DEVICE: access.everyone(), **access.more()}
    body = "\n".join(_hivemq_role(role, rights) for role, rights in roles.items())
    return f"""\
<?xml version="1.0" encoding="UTF-8" ?>
<!-- The fleet {fleet}. Made by `covey broker config`: docs/broker.md. Add a user for every device and role. -->
<file-rbac>
    <users>
    </users>
    <roles>
{body}
    </roles>
</file-rbac>
"""


def _hivemq_role(role: str, rights: Iterable[Right]) -> str:
    activities = {WRITE: "PUBLISH", READ: "SUBSCRIBE", BOTH: "ALL"}
    permissions = "\n".join(
        "                <permission>\n"
        f"                    <topic>{escape(right.topic.replace(SELF, HIVEMQ_USER))}</topic>\n"
        f"                    <activity>{activities[right.verb]}</activity>\n"
        "                </permission>"
        for right in rights
    )
    return f"""\
        <role>
            <id>{role}</id>
            <permissions>
{permissions}
            </permissions>
        </role>"""


def aws_policy(fleet: str, role: str, region: str = "REGION", account: str = "ACCOUNT") -> str:
    """The AWS IoT policy of a role, JSON. A device's name is its certificate's common name, without things.

    The client id carries the fleet and the name, as covey's programs do it: who has another's id cannot connect as it.
    """
    arn = f"arn:aws:iot:{region}:{account}"
    name = AWS_NAME if role == DEVICE else role
    access = Access(fleet)
    rights = access.everyone() if role == DEVICE else access.more()[role]
    written = [right.topic for right in rights if right.verb in (WRITE, BOTH)]
    read = _shared([right.topic for right in rights if right.verb in (READ, BOTH)], access)
    clients = [f"covey-{fleet}-{name}"]
    if role == OPERATOR:
        clients = [f"covey-{fleet}-release-*", *clients]
    statements = [
        _allow(["iot:Connect"], arn, "client", clients),
        _allow(["iot:Publish", "iot:RetainPublish"], arn, "topic", written),
        _allow(["iot:Receive"], arn, "topic", read),
        # what is subscribed to with a + names it here; single chunks and topics need the policy's own wildcard
        _allow(["iot:Subscribe"], arn, "topicfilter", read, subscribed=True),
    ]
    policy = {"Version": "2012-10-17", "Statement": statements}
    return json.dumps(policy, indent=2).replace(SELF, name) + "\n"


def _allow(actions: list[str], arn: str, kind: str, names: list[str], *, subscribed: bool = False) -> dict[str, object]:
    """subscribed: devices of any name are subscribed to with a +, as it stands."""
    told = [name.replace("/+/+", "/*") for name in names]
    told = [name if subscribed and "/device/+" in name else name.replace("+", "*") for name in told]
    return {"Effect": "Allow", "Action": actions, "Resource": [f"{arn}:{kind}/{name}" for name in told]}


def _shared(topics: list[str], access: Access) -> list[str]:
    """Shorter: who reads both of the fleet's topics reads all of them, for there are two."""
    both = {access.round, access.release}
    if not both <= set(topics):
        return topics
    return [*(topic for topic in topics if topic not in both), access.round.replace("/round", "/+")]


def others(fleet: str) -> dict[str, str]:
    """File name -> text."""
    policies = {f"aws-iot-{role}.json": aws_policy(fleet, role) for role in (DEVICE, COORDINATOR, OPERATOR)}
    return {"emqx-acl.conf": emqx_acl(fleet), "hivemq-credentials.xml": hivemq_roles(fleet), **policies}
