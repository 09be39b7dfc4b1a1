-- lib.lua: what every script that changes rooms shares. It is put in front of
-- the script, so all of it is local and nothing runs by itself. It runs with
-- every call, dozens of times for one: strings and tables are what Lua spends
-- its time on, so few are made.
--
-- A record (one field of a room's hash, see codec.go) is
--   entry incarnation ttl stateLength stateVersion flag metaVersion metaLength stateUntil joinedAt seq \n meta state
-- with times in ms. Users' JSON stays bytes: lengths say where it ends. What a
-- script asks most stands in front: whether it still is that entry of that
-- incarnation, and has no TTL and no state, is a comparison of how it begins.
-- What Redis determines stands last, so that the owner makes the rest.

local call, try = redis.call, redis.pcall
local find, sub, match = string.find, string.sub, string.match

local clock = call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
-- Whole numbers below 10^14 turn into their digits when they are put into a string.
local nowText = now .. ''

local RECORD = '^(%S+) (%S+) (%d+) (%d+) (%d+) (%S) (%d+) (%d+) (%d+) (%d+) (%d+)\n'

-- How the record of an event begins that has neither TTL nor metadata nor
-- state; seq follows.
local BARE = ' 0 0 0 . 0 0 0 0 '

local function failed(v)
  return type(v) == 'table' and v.err
end

-- The room at hand. Changes of one room follow each other, so that where it
-- stands is read once for all of them, when that is first asked for.
local room, members, seqKey, channel
local epoch, seq, tag, prev -- epoch nil: not read
local position -- 'epoch seq tag', nil: it has none yet
local home, homes -- how many entries an incarnation has in it: home is '@' and the incarnation
local size -- how many entries it has, nil: not counted

local digits = {} -- of numbers that come more than once

local function int(n)
  local s = digits[n]
  if not s then
    s = n .. ''
    digits[n] = s
  end
  return s
end

local function enter(name, membersKey, positionKey, channels)
  room, members, seqKey, channel, epoch = name, membersKey, positionKey, channels .. name, nil
  size = nil
end

-- stand reads where the room at hand stands (fresh: the epoch of one that has
-- none) and how many entries of an incarnation it has, so that a frame for the
-- room finds the servers to go to. Returns an error of Redis's.
local function stand(field, fresh)
  if epoch and home == field then
    return nil
  end
  local h = try('HMGET', seqKey, 'p', field)
  if h.err then
    return h.err
  end
  home, homes = field, tonumber(h[2] or '0')
  if epoch then
    return nil
  end
  position = h[1]
  if position then
    epoch, seq, tag = match(position, '^(%S+) (%d+) (%S+)$')
  else
    epoch, seq, tag = fresh, '0', '-'
  end
end

-- advance moves the room at hand one event on, and the number of entries that
-- an incarnation has in it by some. It is the first write of every change:
-- where Redis refuses writes (wrong type) it refuses this one, and nothing else
-- has been done. Returns the error.
local function advance(mark, fresh, field, by)
  local err = stand(field, fresh)
  if err then
    return err
  end
  local s = (seq + 1) .. ''
  local p = epoch .. ' ' .. s .. ' ' .. mark
  local n = homes + by
  local w
  if by == 0 or n <= 0 then
    w = try('HSET', seqKey, 'p', p)
  else
    w = try('HSET', seqKey, 'p', p, field, int(n))
  end
  if failed(w) then
    return w.err
  end
  if by ~= 0 and n <= 0 then
    call('HDEL', seqKey, field)
    n = 0
  end
  seq, prev, tag, position, homes = s, tag, mark, p, n
end

-- count returns how many entries the room at hand has, after one has come (by
-- is 1) or gone (-1).
local function count(by)
  size = size and size + by or call('HLEN', members)
  return size
end

-- publish tells the event that advance has made room for.
local function publish(kind, cause, conn, record)
  call('PUBLISH', channel, kind .. ' ' .. epoch .. ' ' .. tag .. ' ' .. prev .. ' ' .. nowText .. ' ' .. cause .. ' ' ..
    conn .. ' ' .. record)
end

-- Changes of an index are collected and written at the end: name -> whether it
-- is to be in it. A name may come and go in one call; the last word counts.
local function write(key, index)
  local come, go = {}, {}
  for name, there in pairs(index) do
    if there then
      come[#come + 1] = name
    else
      go[#go + 1] = name
    end
  end
  for from = 1, #come, 500 do -- what Lua can unpack is limited
    call('SADD', key, unpack(come, from, math.min(from + 499, #come)))
  end
  for from = 1, #go, 500 do
    call('SREM', key, unpack(go, from, math.min(from + 499, #go)))
  end
end

local rooms = {} -- changes of the rooms index

-- How long an empty room's position is remembered.
local KEEP = 3600000

-- remove ends an entry of the room at hand that is known to be there, with the
-- keys of its own, where it has any. Returns the error.
local function remove(conn, entry, inc, connKey, stateKey, mark, fresh, field, cause)
  local err = advance(mark, fresh, field, -1)
  if err then
    return err
  end
  call('HDEL', members, conn)
  if connKey then
    call('DEL', connKey, stateKey)
  end
  if count(-1) == 0 then
    rooms[room] = false
    call('PEXPIRE', seqKey, KEEP)
  end
  publish('L', cause, conn, entry .. ' ' .. inc .. BARE .. seq .. '\n')
end
