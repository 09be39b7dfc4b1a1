// Package meshdebug serves a page, and the same data as JSON, for operators of servers
// that use mesh. It shows the live servers and the age of their leases, the rooms with
// their numbers of members, the server of a connection, the entries of one room in Redis,
// the lag of this server's copies of watched rooms, and this server's counts.
//
//	http.Handle("/debug/mesh/", behindMyOwnAuth(meshdebug.NewHandler(srv, meshdebug.Options{})))
//
// # Access
//
// THE HANDLER HAS NO AUTHENTICATION, AND IT SHOWS DATA THAT GUARDS HIDE: every room,
// every connection in it, its metadata and its state. Mount it behind your own
// authentication, or on a listener that only you can reach, such as another port on the
// loopback interface. Never mount it unprotected beside the public handler.
// [Options.HideData] leaves out metadata and states, but the page still shows the members
// of every room.
//
// # Cost
//
// The handler reads from masters and writes nothing to Redis. A page takes at most about
// two seconds and a few round trips for any number of rooms and members, because it reads
// them in pages. At most eight pages are made at a time. Further requests are answered
// with 503.
//
// # Addresses
//
// The handler ignores the path that it is mounted at. All parameters are in the query,
// and links are relative.
//
//	?                       an overview: servers, the first rooms, watched rooms, counts
//	?view=rooms             rooms: prefix=…, cursor=… (the next of the page before), limit=…
//	?view=watched           rooms that this server watches: prefix=…, stale=1, after=…, limit=…
//	?room=NAME              one room: cursor=…, limit=…
//	?conn=ID                one connection, on any server
//	&format=json            the same as JSON, like an Accept of application/json
//	&refresh=5              the page reloads itself every five seconds (1 to 3600)
//
// The status is 200 if everything could be read. It is 503 if Redis did not answer or the
// server does not run. The page then shows the data that is known without Redis, and each part names the missing data. The status is 404 if no server has the requested connection,
// 400 for an invalid query, and 405 for a method other than GET and HEAD.
//
// # JSON
//
// Durations are in seconds, times in RFC 3339. Later versions may add keys. Parts that a
// view does not have are left out. A part that could not be read has an error instead of
// its list.
//
//	{
//	  "view": "overview", "time": "…", "ready": true,
//	  "servers": {"list": [{"incarnation": "…", "name": "web-1", "self": true, "state": "living" | "lapsed" | "dead",
//	      "leaseLeftSeconds": 7.1, "leaseAgeSeconds": 2.9, "deadForSeconds": 0, "owned": 12}]},
//	  "connection": {"id": "…", "known": true, "server": "…", "serverName": "web-1", "serverState": "living", "self": true,
//	      "hidden": false, "metadata": {}, "rooms": [{"name": "lobby", "entry": {…as in a room…}}]},
//	  "rooms":   {"total": 3, "prefix": "", "list": [{"name": "lobby", "members": 2, "tracked": true}], "next": ""},
//	  "watched": {"total": 1, "prefix": "", "stale": false, "list": [{"name": "lobby", "subscriptions": 1,
//	      "members": 2, "stale": false, "epoch": "…", "seq": 9, "redisEpoch": "…", "redisSeq": 9, "behind": 0}], "next": ""},
//	  "room":    {"name": "lobby", "epoch": "…", "seq": 9, "total": 2, "now": "…", "hidden": false,
//	      "entries": [{"connectionId": "…", "id": "…", "server": "…", "serverName": "web-1", "serverState": "living", "joinedAt": "…",
//	      "ttlSeconds": 60, "seq": 8, "metadata": {}, "state": {}, "stateUntil": "…"}], "next": ""},
//	  "stats":   {"connections": 12, "leaseAgeSeconds": 2.9}
//	}
//
// If known is null, Redis did not answer. If entry is null, Redis holds no entry or could
// not be read. If behind is null, it is not known. A server without a name has no name
// key. A serverState of "unknown" says that the server is on neither list of Redis: it is
// no longer alive, and nothing remains to be cleaned up. It may have been there a moment
// ago, or its entry is a leftover. The keys of stats are the fields of [mesh.Stats] with
// a small first letter, and with Seconds at the end of a duration's name.
package meshdebug
