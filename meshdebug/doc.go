// Package meshdebug serves a page for whoever looks after servers that use
// mesh, and the same as JSON: which servers live and how old their leases are,
// the rooms with how many are in each, what Redis holds of one room, how far
// this server's copies of watched rooms are behind Redis, and its counts.
//
//	http.Handle("/debug/mesh/", behindMyOwnAuth(meshdebug.NewHandler(srv, meshdebug.Options{})))
//
// # Who may see it
//
// THE HANDLER ASKS NOBODY WHO THEY ARE, AND IT SHOWS WHAT GUARDS HIDE: every
// room, every connection in it, its metadata and its state. Mount it behind
// your own authentication, or on a listener that only you can reach (another
// port on the loopback, say), never beside the public handler as it is.
// [Options.HideData] leaves out metadata and states, which still leaves who is
// where.
//
// # What it costs
//
// It only reads, from masters, and writes nothing to Redis. A page takes at
// most about two seconds and a few round trips, whatever there is: rooms and
// members come in pages. No more than eight pages are made at a time; who comes
// then is answered with 503.
//
// # Addresses
//
// It does not mind the path that it is mounted at: everything is in the query,
// and links are relative.
//
//	?                       an overview: servers, the first rooms, watched rooms, counts
//	?view=rooms             rooms: prefix=…, cursor=… (the next of the page before), limit=…
//	?view=watched           rooms that this server watches: prefix=…, stale=1, after=…, limit=…
//	?room=NAME              one room: cursor=…, limit=…
//	&format=json            the same as JSON, as does an Accept of application/json
//	&refresh=5              the page loads itself anew every five seconds (1 to 3600)
//
// 200 where all could be read, 503 where Redis did not answer or the server does
// not run: what is known without it is shown all the same, and each part says
// what is missing. 400 for a query that makes no sense, 405 for a method other
// than GET and HEAD.
//
// # JSON
//
// Durations are in seconds, times in RFC 3339. Keys may be added. Parts that a
// view does not have are left out, and a part that could not be read has an
// error in place of its list.
//
//	{
//	  "view": "overview", "time": "…", "ready": true,
//	  "servers": {"list": [{"incarnation": "…", "self": true, "state": "living" | "lapsed" | "dead",
//	      "leaseLeftSeconds": 7.1, "leaseAgeSeconds": 2.9, "deadForSeconds": 0, "owned": 12}]},
//	  "rooms":   {"total": 3, "prefix": "", "list": [{"name": "lobby", "members": 2, "tracked": true}], "next": ""},
//	  "watched": {"total": 1, "prefix": "", "stale": false, "list": [{"name": "lobby", "subscriptions": 1,
//	      "members": 2, "stale": false, "epoch": "…", "seq": 9, "redisEpoch": "…", "redisSeq": 9, "behind": 0}], "next": ""},
//	  "room":    {"name": "lobby", "epoch": "…", "seq": 9, "total": 2, "now": "…", "hidden": false,
//	      "entries": [{"connectionId": "…", "id": "…", "server": "…", "serverState": "living", "joinedAt": "…",
//	      "ttlSeconds": 60, "seq": 8, "metadata": {}, "state": {}, "stateUntil": "…"}], "next": ""},
//	  "stats":   {"connections": 12, "leaseAgeSeconds": 2.9}
//	}
//
// A behind of null is not known. A serverState of "unknown" says that the
// server is neither alive nor being cleaned up after: it was, a moment ago, or
// its entry is a leftover. The keys of stats are the fields of [mesh.Stats],
// with a small first letter, and with Seconds at the end of a duration's.
package meshdebug
