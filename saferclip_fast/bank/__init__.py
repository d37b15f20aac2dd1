"""Safe rows to redirect to: on one device (SafeBank), or spread over ranks and files (ShardedBank)."""

from .safe_bank import SafeBank
from .sharded import ShardedBank

Bank = SafeBank | ShardedBank  # both have nearest(query, k) and gather(neighbors)

__all__ = ["Bank", "SafeBank", "ShardedBank"]
