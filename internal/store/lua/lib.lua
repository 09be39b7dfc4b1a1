-- lib.lua: what every script that changes rooms shares. It is put in front of
-- the script, so all of it is local and nothing runs by itself. What costs here
-- is calls of Redis, strings (Redis has Lua hash every byte of each), patterns
-- with captures, and tables: few of them are made.
--
-- A record (one field of a room's hash, see codec.go) is
--   entry incarnation ttl stateLength stateVersion flag metaVersion metaLength stateUntil joinedAt seq \n meta state
-- with times in ms. Users' JSON stays bytes: lengths say where it ends. What a
-- script asks most stands in front: whether it still is that entry of that
-- incarnation, and has no TTL and no state, is a comparison of how it begins.
-- What Redis determines stands last, so that the owner makes the rest.
--
-- Where a room stands is 'epoch seq tag', followed by ' incarnation entries' of
-- each that has entries in it, so that a frame for the room finds the servers to
-- go to. The epoch ends in '@' and the time when it began, in ms.

local call, try = redis.call, redis.pcall
local find, sub, match = string.find, string.sub, string.match

local args, keys = ARGV, KEYS

local clock = call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local nowText = string.format('%.0f', now)

-- What follows entry and incarnation in a record: ttl, what it says of the state
-- (its length, its version), of the metadata (version, length), until, joined, seq.
local REST = '^(%d+) ((%d+) (%d+) %S )((%d+) (%d+) )(%d+) (%d+) (%d+)\n'
local ODD = 'WRONGFORMAT not of this layout'

-- How the record of an event goes on behind entry and incarnation that has
-- neither TTL nor metadata nor state; seq follows.
local BARE = '0 0 0 . 0 0 0 0 '

local function failed(v)
  return type(v) == 'table' and v.err
end

-- spread calls a command with all of a list: what Lua can unpack is limited.
local function spread(command, key, list)
  for from = 1, #list, 500 do
    local to = math.min(from + 499, #list)
    if key then
      call(command, key, unpack(list, from, to))
    else
      call(command, unpack(list, from, to))
    end
  end
end

-- Positions of the rooms of this call, in the order in which they will be
-- entered. They are read at once at the beginning and written at once at the
-- end: by then nothing is refused any more, because each op has asked before it
-- wrote (see stand), and Redis refuses for want of memory at the first write only.
local positions, firstPosition, entered = {}, nil, 0

local function readPositions(from, count)
  firstPosition = from
  for i = 0, count - 1, 500 do
    local some = call('MGET', unpack(keys, from + i, from + math.min(i + 500, count) - 1))
    if i == 0 then
      positions = some
    else
      for n = 1, #some do
        positions[i + n] = some[n]
      end
    end
  end
end

-- The room at hand. Each room is entered once.
local room, members, seqKey, channel
local epoch, seq, tag, prev -- seq: in digits; epoch nil: not asked for yet
local position -- 'epoch seq tag', '' where there is none yet
local tracked -- whether the caller has a rule for it
local moved -- something of it has been written
local homes -- as in the position, without
local home, entries -- the incarnation that is being counted, as ' incarnation ', and what it has
local size, before -- how many entries it has, nil: not counted; and had at first
local missed -- the end of an entry has been told whose record is lost
local placed -- it had a position before this call

local filled, emptied = {}, {} -- rooms
local standing = {} -- key, value, ... of rooms that have moved

-- How long the position of an empty room is kept, and from what age of its epoch
-- a room counts as used rather than visited, all in ms.
--
-- Promise 5 does not rest on the position: late batches are refused by the number
-- in the fence, retried ones by the ids of their entries. The position only saves
-- mirrors work. If it is gone, the next join begins a new epoch, and a mirror
-- cannot tell whether Redis lost the members that it lists. It keeps them in
-- doubt for LeaseTTL + 1 s. So the position must be there when a mirror that
-- missed the last leave is compared, which is every 10 s, and once more if Redis
-- did not answer that call (1.8 s). A client that reconnects, or a page that is
-- loaded again, takes a few seconds, and joins the same epoch.
--
-- Rooms that were only visited are kept no longer than that: otherwise anyone
-- could fill Redis with made-up names. No subscriber of an untracked room exists,
-- so its position orders nothing. It is kept as long as a visited one, because
-- another server may track the room.
local KEEP_USED, KEEP_VISITED = 3600000, 15000
local USED_AFTER = 60000

-- keep returns how long the position of the room at hand is kept, now that it is
-- empty. An epoch without a time was begun by an earlier version.
local function keep()
  local began = tracked and (match(epoch, '@(%d+)$') or '0')
  if began and now - tonumber(began) > USED_AFTER then
    return KEEP_USED
  end
  return KEEP_VISITED
end

local function fold()
  if home and entries > 0 then
    homes = homes .. home .. entries
  end
  home = nil
end

-- settle writes where the room at hand stands now.
local function settle()
  if not moved then
    return
  end
  fold()
  -- A room that lost its records is empty only if no incarnation is counted in
  -- it any more. Until then the counts tell readers that records are missing.
  if missed and homes == '' then
    size = call('HLEN', members)
  end
  if size == 0 and (homes == '' or not missed) then
    emptied[#emptied + 1] = room
    call('SET', seqKey, position, 'PX', keep())
    return
  end
  if before == 0 then
    filled[#filled + 1] = room
  end
  local n = #standing
  standing[n + 1] = seqKey
  standing[n + 2] = position .. homes
end

local function enter(name, flag, membersKey, channels)
  settle()
  tracked = flag == '1'
  room, members, seqKey, channel = name, membersKey, keys[firstPosition + entered], channels .. name
  entered = entered + 1
  epoch, moved, home, size, before, missed, placed = nil, false, nil, nil, nil, false, false
end

-- attempt does the work of a call and then writes what has been collected. That
-- it does also where Redis stops the work in its midst, as it does when the user
-- has lost a right: what has been changed must not stand under a position that
-- nobody misses, nor the number of what has been told be given again. Returns
-- what Redis said then, as the script's reply: raised, it would be in other words.
local function attempt(work, roomsKey)
  local fine, why = pcall(work)
  settle()
  spread('MSET', nil, standing)
  spread('SADD', roomsKey, filled)
  spread('SREM', roomsKey, emptied)
  return not fine and { err = why }
end

-- stand makes sure that it is known where the room at hand stands (fresh: what
-- the epoch of a room without a position begins with). It must be asked before
-- anything of the room is written. Returns why the room cannot be changed.
local function stand(fresh)
  if epoch then
    return nil
  end
  local p = positions[entered]
  if not p then
    local v = try('GET', seqKey) -- MGET does not tell a wrong type from none
    if failed(v) then
      return v.err
    end
    local n = try('HLEN', members)
    if failed(n) then
      return n.err
    end
    size, before = n, n
    -- Members without a position carry numbers of an epoch that is lost. The
    -- new epoch begins above them, so that the higher number still is the newer.
    epoch, seq, tag, position, homes = fresh .. '@' .. nowText, n == 0 and '0' or nowText, '-', '', ''
    return nil
  end
  local i = find(p, ' ', 1, true) or 0
  local _, j = find(p, '^%d+ ', i + 1)
  if i == 0 or not j then
    return ODD
  end
  local k = find(p, ' ', j + 1, true) or #p + 1
  placed = true
  epoch, seq, tag, position, homes = sub(p, 1, i - 1), sub(p, i + 1, j - 1), sub(p, j + 1, k - 1), sub(p, 1, k - 1), sub(p, k)
end

-- following is the seq of the next event.
local function following()
  return (seq + 1) .. ''
end

-- advance moves the room at hand, of which it is known where it stands, one
-- event on.
local function advance(mark, next)
  seq, prev, tag, moved = next or following(), tag, mark, true
  position = epoch .. ' ' .. seq .. ' ' .. mark
end

-- count notes that an entry of an incarnation has come (by is 1) or gone (-1).
local function count(inc, by)
  if home ~= inc then
    fold()
    home, entries = inc, 0
    local a, b = find(homes, inc, 1, true)
    if a then
      local c = find(homes, ' ', b + 1, true) or #homes + 1
      entries = tonumber(sub(homes, b + 1, c - 1)) or 0
      homes = sub(homes, 1, a - 1) .. sub(homes, c)
    end
  end
  entries = entries + by
end

-- sized notes that the room at hand has one entry more (by is 1) or less (-1)
-- than before, and returns how many it has.
local function sized(by)
  if size then
    size = size + by
  else
    size = call('HLEN', members)
    before = size - by
  end
  return size
end

-- bereft reports whether the room at hand, which has just got its first entry,
-- had counted others: their records are lost. It then begins a new epoch, so that
-- mirrors do not take what is missing for what has left.
local function bereft(fresh)
  if size ~= 1 or homes == '' and (not home or entries <= 0) then
    return false
  end
  epoch, seq, tag, homes, home = fresh .. '@' .. nowText, '0', '-', '', nil
  return true
end

-- publish tells the event that advance has made room for.
local function publish(kind, cause, conn, record)
  call('PUBLISH', channel, kind .. ' ' .. epoch .. ' ' .. tag .. ' ' .. prev .. ' ' .. nowText .. ' ' .. cause .. ' ' ..
    conn .. ' ' .. record)
end

-- counted returns how many entries the room at hand counts of all incarnations but
-- the one that is being counted.
local function counted()
  local sum = 0
  for n in string.gmatch(homes, ' %S+ (%d+)') do
    sum = sum + tonumber(n)
  end
  return sum
end

-- overcounted reports whether the room at hand counts more entries than it has
-- records, given the incarnation of one of them: some records are lost.
local function overcounted(inc)
  count(inc, 0)
  return counted() + entries > (size or call('HLEN', members))
end

-- farewell tells that an entry of the room at hand has left whose record is lost:
-- mirrors may still list it. Those that do not ignore it.
local function farewell(conn, entry, inc, mark, cause)
  advance(mark)
  missed = true
  if overcounted(inc) then
    count(inc, -1)
  end
  publish('L', cause, conn, entry .. inc .. BARE .. seq .. '\n')
end

-- remove ends an entry of the room at hand that is known to be there, with the
-- keys of its own, where it has any.
local function remove(conn, entry, inc, connKey, stateKey, mark, cause)
  advance(mark)
  call('HDEL', members, conn)
  if connKey then
    call('DEL', connKey, stateKey)
  end
  sized(-1)
  count(inc, -1)
  publish('L', cause, conn, entry .. inc .. BARE .. seq .. '\n')
end
