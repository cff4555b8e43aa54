"""Everything that touches Flower: its SuperLink and SuperNode as processes of ours, and bytes between them.

Flower moves messages between a coordinator and nodes, over TLS, and knows nodes by their keys. What it offers beyond
is left out: its apps are code that the coordinator sends to run at the nodes. Here both ends run with `--isolation
process`, where Flower starts no app, and the verbs take the place of the processes that would: they take the tasks and
answer the messages themselves, and the app that Flower asks for is empty and never loaded. A secret of each machine
guards that place. Telemetry, the check for updates and the installing of dependencies are off.

The calls are Flower's own of its processes, not a public interface, so the extra `federated` pins its version.
"""
